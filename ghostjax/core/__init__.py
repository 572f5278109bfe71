"""The jaxpr walk: value classes, row axes, control flow, meetings."""

from ghostjax.core import control as control
from ghostjax.core import custom_rules as custom_rules
from ghostjax.core import manual as manual
from ghostjax.core.directed import Directed as Directed
from ghostjax.core.harvest import Harvest as Harvest
from ghostjax.core.harvest import contract as contract
from ghostjax.core.harvest import mapped as mapped
from ghostjax.core.harvest import summed as summed
from ghostjax.core.meeting import Meeting as Meeting
from ghostjax.core.meeting import Route as Route
from ghostjax.core.places import Rows as Rows
from ghostjax.core.places import infer as infer
from ghostjax.core.push import Push as Push
from ghostjax.core.split import Found as Found
from ghostjax.core.split import Split as Split
from ghostjax.core.types import added_up as added_up
from ghostjax.core.types import typed_as as typed_as
from ghostjax.core.types import varying_as as varying_as
from ghostjax.core.types import zeros_of as zeros_of
from ghostjax.core.values import Value as Value
from ghostjax.core.walk import Walk as Walk
