"""The types of the public functions' results, for annotations: `def log(audit: statewise.results.Audit) -> None`."""

from statewise._src.checkpoint.checkpointable import Checkpointable
from statewise._src.checkpoint.diff.result import Diff, LeafDiff
from statewise._src.checkpoint.interop.convert import Conversion
from statewise._src.checkpoint.restore_report import LeafRestore, RestoreReport
from statewise._src.checkpoint.restore_result import RestoreResult
from statewise._src.common.paths import Leaf
from statewise._src.common.tables import KindCount
from statewise._src.inspect.audit.result import Audit, KindAudit, LeafAudit
from statewise._src.inspect.census import Census
from statewise._src.inspect.lint.finding import Finding, Findings
from statewise._src.inspect.memory import KindMemory, Memory
from statewise._src.inspect.select.select import Explanation
from statewise._src.inspect.watch.result import LeafChange
from statewise._src.inspect.watch.watch import Watch
from statewise._src.names.proposal import NamesProposal
from statewise._src.report.gather import LeafReport
from statewise._src.report.report import Report
from statewise._src.step.aot import Compiled, Lowered
from statewise._src.step.measured import Measured
from statewise._src.step.step import Step

__all__ = [
    "Audit",
    "Census",
    "Checkpointable",
    "Compiled",
    "Conversion",
    "Diff",
    "Explanation",
    "Finding",
    "Findings",
    "KindAudit",
    "KindCount",
    "KindMemory",
    "Leaf",
    "LeafAudit",
    "LeafChange",
    "LeafDiff",
    "LeafReport",
    "LeafRestore",
    "Lowered",
    "Measured",
    "Memory",
    "NamesProposal",
    "Report",
    "RestoreReport",
    "RestoreResult",
    "Step",
    "Watch",
]
