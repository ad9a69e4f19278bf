"""Who may approve what: the policy in `approvers.yaml`.

It is read from a protected ref and never from what is to be approved, see
`accepted_approvers`. docs/approvals.md describes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from pydantic import AwareDatetime, Field, ValidationError, field_validator

from llmops_assets.errors import ApprovalError, SpecError
from llmops_assets.evidence.approver_keys import read_public_key
from llmops_assets.evidence.attest import APPROVERS_FILE
from llmops_assets.evidence.dsse import Key
from llmops_assets.serving.slots import Environment
from llmops_assets.spec import Section, mistake, read_yaml

POLICY_FILE = APPROVERS_FILE
"""In the folder of specs of the protected ref."""
EXAMPLE = "docs/approvals.md"

Place = tuple[str | int, ...]


class ApproverKey(Section):
    """A key that an approver signs with."""

    key: str = Field(description="The line of the .pub file: ssh-ed25519, base64, comment.")
    valid_from: AwareDatetime | None = None
    valid_until: AwareDatetime | None = None

    @field_validator("key")
    @classmethod
    def _readable(cls, line: str) -> str:
        try:
            read_public_key(line)
        except ApprovalError as error:
            raise ValueError(str(error)) from error
        return line

    @property
    def public_key(self) -> Key:
        return read_public_key(self.key)

    def objection(self, at: datetime) -> str | None:
        """Why it may not be used at a time; None if it may."""
        if self.valid_from is not None and at < self.valid_from:
            return f"the key is valid from {self.valid_from:%F %T %Z} on"
        if self.valid_until is not None and at >= self.valid_until:
            return f"the key expired at {self.valid_until:%F %T %Z}"
        return None


class Approver(Section):
    """A person who may approve."""

    name: str = Field(min_length=1, description="What records call the person.")
    identities: tuple[str, ...] = Field(
        default=(),
        description="E-mail addresses and other names that are the same person: as author of "
        "commits, and as who asks for releases.",
    )
    keys: tuple[ApproverKey, ...] = Field(min_length=1)

    def is_one_of(self, people: Iterable[str]) -> str | None:
        """The first of some names that may be this person's; None for none."""
        own = (self.name, *self.identities)
        return next((name for name in people if any(same_person(name, o) for o in own)), None)


class Rule(Section):
    """Who may approve some models, and how many of them are needed."""

    environment: Environment = Environment.PRODUCTION
    models: str = Field(default="*", description="Names, with * and ? as in a shell.")
    approvers: tuple[str, ...] = Field(min_length=1, description="Names of approvers or groups.")
    required: int = Field(default=1, ge=1, description="How many different people.")
    longest_validity_days: float = Field(default=7.0, gt=0)
    separation: bool = Field(
        default=True,
        description="Whether who wrote the change, asked for the release or started the run is "
        "not among them.",
    )

    @property
    def longest_validity(self) -> timedelta:
        return timedelta(days=self.longest_validity_days)


class PolicyChange(Section):
    """What a change of the policy needs."""

    required: int = Field(ge=1, description="How many of the approvers must have signed it.")


class ApproversPolicy(Section):
    """The whole policy."""

    approvers: tuple[Approver, ...] = Field(min_length=1)
    groups: dict[str, tuple[str, ...]] = Field(default={}, description="Approvers by group.")
    rules: tuple[Rule, ...] = Field(
        min_length=1, description="The first that fits environment and model decides."
    )
    policy_change: PolicyChange

    def rule_for(self, environment: Environment, model: str) -> Rule | None:
        """The rule that decides; None where nobody may approve."""
        fits = (r for r in self.rules if r.environment == environment)
        return next((r for r in fits if fnmatchcase(model, r.models)), None)

    def may_approve(self, rule: Rule, approver: Approver) -> bool:
        """Whether a rule names an approver, or one of their groups."""
        return approver.name in self._members(rule)

    def holder(self, keyid: str) -> tuple[Approver, ApproverKey] | None:
        """Whose key this is; None for nobody's."""
        return next(
            (
                (approver, key)
                for approver in self.approvers
                for key in approver.keys
                if key.public_key.keyid == keyid
            ),
            None,
        )

    def inconsistencies(self) -> Iterator[tuple[Place, str]]:
        """What no single field shows: each with its place."""
        names = [approver.name for approver in self.approvers]
        taken: set[str] = set()
        keys: set[str] = set()
        for place, approver in enumerate(self.approvers):
            for identity in dict.fromkeys((approver.name, *approver.identities)):
                if identity.casefold() in taken:
                    yield ("approvers", place), f"{identity} is another approver as well"
                taken.add(identity.casefold())
            for number, key in enumerate(approver.keys):
                if (keyid := key.public_key.keyid) in keys:
                    yield ("approvers", place, "keys", number), f"{keyid} is given twice"
                keys.add(keyid)
        for group, members in self.groups.items():
            if group in names:
                yield ("groups", group), f"{group} is an approver's name"
            if unknown := [member for member in members if member not in names]:
                yield ("groups", group), f"no approver is named {', '.join(unknown)}"
        for place, rule in enumerate(self.rules):
            known = {*names, *self.groups}
            if unknown := [name for name in rule.approvers if name not in known]:
                yield ("rules", place, "approvers"), f"nobody is named {', '.join(unknown)}"
            elif rule.required > len(self._members(rule)):
                more = f"{rule.required} of {len(self._members(rule))} approvers is more than all"
                yield ("rules", place, "required"), more
        if (required := self.policy_change.required) > len(self.approvers):
            more = f"{required} of {len(self.approvers)} approvers is more than all"
            yield ("policy_change", "required"), more

    def _members(self, rule: Rule) -> set[str]:
        return {member for name in rule.approvers for member in self.groups.get(name, (name,))}


def read_policy_file(path: Path) -> ApproversPolicy:
    """Reads the policy as it lies in the working tree: to check it before it is signed.

    Raises:
        SpecError: it cannot be read or is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(str(path), str(error)) from error
    return parse_policy(text, str(path))


def parse_policy(text: str, source: str) -> ApproversPolicy:
    """Reads the policy.

    Args:
        text: YAML.
        source: what errors call it.

    Raises:
        SpecError: naming the line of every mistake.
    """
    try:
        content, duplicates = read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _invalid(source, str(error)) from error
    if not isinstance(content, dict):
        raise _invalid(source, f"a {type(content).__name__} in place of a mapping")
    misplaced: list[tuple[Place, str]] = []
    try:
        policy = ApproversPolicy.model_validate(content)
    except ValidationError as error:
        misplaced += [(detail["loc"], detail["msg"]) for detail in error.errors()]
    else:
        misplaced += policy.inconsistencies()
        if not (duplicates or misplaced):
            return policy
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert root is not None  # it is a mapping
    mistakes = [f"line {line}: {key!r} is given twice; keep one" for key, line in duplicates]
    mistakes += [mistake(root, place, message) for place, message in misplaced]
    raise _invalid(source, "; ".join(mistakes))


def same_person(one: str, other: str) -> bool:
    """Whether two names may be one person's: git knows an address, a machine a login name."""
    names = [name.strip().casefold() for name in (one, other)]
    return names[0] == names[1] or names[0].partition("@")[0] == names[1].partition("@")[0]


def _invalid(source: str, found: str) -> SpecError:
    return SpecError(
        f"{source} is not a valid policy of approvers",
        expected="approvers with keys, rules and policy_change",
        found=found,
        cure=f"mend these lines; {EXAMPLE} has an example",
    )
