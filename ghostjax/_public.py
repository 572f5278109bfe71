"""The public names of the package, which hands them on when they are first asked for."""

from ghostjax import directions as directions
from ghostjax import fidelity as fidelity
from ghostjax import linen as linen
from ghostjax import selection as selection
from ghostjax import testing as testing
from ghostjax._aggregate import aggregate as aggregate
from ghostjax._dots import GradDots as GradDots
from ghostjax._dots import conservation_error as conservation_error
from ghostjax._early import value_grad_and_dots as value_grad_and_dots
from ghostjax._engine import GradDotProdEngine as GradDotProdEngine
from ghostjax._explain import explain as explain
from ghostjax._explanation import Explanation as Explanation
from ghostjax._kinds import by_kind as by_kind
from ghostjax._late import LateDots as LateDots
from ghostjax._late import value_and_dots_fn as value_and_dots_fn
from ghostjax._log import aggregate_and_log as aggregate_and_log
from ghostjax._norms import squared_norms as squared_norms
from ghostjax._norms import value_and_clipped_grad as value_and_clipped_grad
from ghostjax._pairs import pairwise_dots as pairwise_dots
from ghostjax._rowwise import register_row_rule as register_row_rule
from ghostjax._rowwise import rowwise as rowwise
from ghostjax._run import run as run
from ghostjax._step_memory import StepMemory as StepMemory
from ghostjax._task import Task as Task
from ghostjax._types import EngineResult as EngineResult
from ghostjax.values import InRunValues as InRunValues
