"""Tasks of one's own for ``ghostjax train --task examples.<name>:task``; the tests run each."""
