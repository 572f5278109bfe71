"""In-run data values: train on text, and record how much every document helped or hurt."""

from ghostjax.runs.config import TrainConfig as TrainConfig
from ghostjax.runs.config import UsageError as UsageError
