"""The jaxpr walk: value classes, row axes, control flow."""

from ghostjax._walk import _control as _control
from ghostjax._walk import _custom_rules as _custom_rules
from ghostjax._walk._rows import Rows as Rows
from ghostjax._walk._values import Value as Value
from ghostjax._walk._walk import Walk as Walk
