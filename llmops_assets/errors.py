"""The errors this platform raises on purpose.

Every message says what was expected, what was found and what to do, because the
reader is an engineer looking at a failed step at night. Catch `LLMOpsError` at a
boundary (the command line, a Dagster asset); never to carry on regardless.
"""

from __future__ import annotations


class LLMOpsError(Exception):
    """Base of all errors whose cause and cure are known.

    Args:
        problem: what went wrong, in one sentence.
        expected: what would have been right.
        found: what was there instead.
        cure: what the reader should do now.
    """

    def __init__(
        self,
        problem: str,
        *,
        cure: str,
        expected: object | None = None,
        found: object | None = None,
    ) -> None:
        self.problem = problem
        self.expected = expected
        self.found = found
        self.cure = cure
        parts = [problem.rstrip(".") + "."]
        if expected is not None:
            parts.append(f"Expected: {str(expected).rstrip('.')}.")
        if found is not None:
            parts.append(f"Found: {str(found).rstrip('.')}.")
        parts.append(f"To do: {cure.rstrip('.')}.")
        super().__init__(" ".join(parts))


class SettingsError(LLMOpsError):
    """A setting in the environment is not valid."""


class SpecError(LLMOpsError):
    """A model spec is not valid; the message names file and line."""


class ReleaseError(LLMOpsError):
    """A release key is malformed, or the release does not exist."""


class StoreError(LLMOpsError):
    """The artifact store could not do what was asked."""


class ArtifactCorruptError(StoreError):
    """Bytes in the store or a slot are not the bytes their digest promises."""


class RefConflictError(StoreError):
    """A compare-and-set lost against another writer."""


class DataError(LLMOpsError):
    """Training or evaluation data, or a checkpoint, cannot be used as it is."""


class ToolError(LLMOpsError):
    """An external tool or heavy step failed, timed out or could not start."""


class ToolchainError(LLMOpsError):
    """A toolchain refuses a request, or its output is not what it promises."""


class GateRefusedError(LLMOpsError):
    """A verdict that something depends on is missing, failed, stale or about other bytes."""


class ApprovalError(LLMOpsError):
    """There is no approval for exactly these bytes."""


class EvidenceError(LLMOpsError):
    """Evidence is missing, not signed by a trusted key, or does not fit together."""


class SlotError(LLMOpsError):
    """A serving slot did not start, did not answer, or holds something else."""


class GatewayError(LLMOpsError):
    """The gateway did not take a route."""


class RegistryError(LLMOpsError):
    """The model registry does not answer or holds something else."""


class LifecycleOrderError(LLMOpsError):
    """A step of the lifecycle was asked for out of order."""


class TriggerError(LLMOpsError):
    """What a trigger listens to does not answer, or says what cannot be understood."""


class StackError(LLMOpsError):
    """The local stack cannot start, or is not running."""
