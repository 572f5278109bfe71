"""In-run data values: train, and record how much every training example helped or hurt."""

from ghostjax.runs.config import TrainConfig as TrainConfig
from ghostjax.runs.errors import UsageError as UsageError
