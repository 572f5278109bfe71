"""The jaxpr walk: value classes, row axes, control flow, meetings."""

from ghostjax._walk import _control as _control
from ghostjax._walk import _custom_rules as _custom_rules
from ghostjax._walk._directed import Directed as Directed
from ghostjax._walk._directed import typed_as as typed_as
from ghostjax._walk._harvest import Harvest as Harvest
from ghostjax._walk._harvest import contract as contract
from ghostjax._walk._harvest import mapped as mapped
from ghostjax._walk._harvest import summed as summed
from ghostjax._walk._meeting import Meeting as Meeting
from ghostjax._walk._meeting import Route as Route
from ghostjax._walk._push import Push as Push
from ghostjax._walk._rows import Rows as Rows
from ghostjax._walk._rows import infer as infer
from ghostjax._walk._split import Found as Found
from ghostjax._walk._split import Split as Split
from ghostjax._walk._values import Value as Value
from ghostjax._walk._walk import Walk as Walk
