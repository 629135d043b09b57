"""What a step will do to a state, told before it runs.

The files: `dependence` (which outputs of a jaxpr depend on which inputs, and so which gradients are zero whatever the
numbers), `rows` (the report: one row for each leaf, counts for each kind), `auditing` (`audit` itself).
"""

from statewise.audit.auditing import audit
from statewise.audit.rows import Audit, KindAudit, LeafAudit

__all__ = ["Audit", "KindAudit", "LeafAudit", "audit"]
