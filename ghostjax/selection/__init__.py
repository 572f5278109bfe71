"""Which rows to train on, how much, and from which domains."""

from ghostjax.selection.candidates import Candidates as Candidates
from ghostjax.selection.candidates import at_random as at_random
from ghostjax.selection.candidates import by_loss as by_loss
from ghostjax.selection.candidates import by_norm as by_norm
from ghostjax.selection.candidates import by_score as by_score
from ghostjax.selection.mixture import mixture as mixture
from ghostjax.selection.step import Selected as Selected
from ghostjax.selection.step import select_step as select_step
from ghostjax.selection.weights import greedy as greedy
from ghostjax.selection.weights import rows as rows
from ghostjax.selection.weights import sample as sample
from ghostjax.selection.weights import softmax as softmax
from ghostjax.selection.weights import threshold as threshold
from ghostjax.selection.weights import top_k as top_k
