"""The repository whose pushes make releases: its address, and calls to it over a network.

A call ends in time and never asks anybody. Credentials in the address are taken out of
it, so that they get into no command line, log, error, cursor or file.
"""

from __future__ import annotations

import os
import re
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit, urlunsplit

from llmops_assets.errors import SettingsError, ToolError, TriggerError
from llmops_assets.git import git_environment
from llmops_assets.settings import Settings
from llmops_assets.storage.store import digest_of
from llmops_assets.tools import run_tool

SCHEMES = ("file", "https", "ssh")
# As in git@example.org:team/models.git; no part of it may look like an option.
SHORT_SSH = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*:[^-:/\s][^\s]*")
SSH_COMMAND = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10"
OPTIONS = ("-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "core.hooksPath=/dev/null")
"""Nothing is ever deleted from a mirror: commits of releases stay readable."""


@dataclass(frozen=True)
class Remote:
    """A branch of a repository somewhere."""

    address: str
    """Path or URL, without credentials."""
    branch: str
    authorization: str | None = field(default=None, repr=False)
    """Value of the HTTP header that was in the address as user and password."""

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """The one that the settings name, or None.

        Raises:
            SettingsError: the address is of no form that is allowed.
        """
        given = settings.git_repository
        if given is None:
            return None
        if given.startswith(("/", "~/")):
            return cls(str(Path(given).expanduser()), settings.git_branch)
        if SHORT_SSH.fullmatch(given) and "://" not in given:
            return cls(given, settings.git_branch)
        try:
            url = urlsplit(given)
            user, password = url.username, url.password
        except ValueError as error:
            raise _refused() from error  # whose text may hold the password
        host = url.netloc.rpartition("@")[2]
        if url.scheme not in SCHEMES or host.startswith("-") or not (host or url.scheme == "file"):
            raise _refused()
        if url.scheme != "https":
            if password is not None or (user or "").startswith("-"):
                raise _refused()
            return cls(given, settings.git_branch)
        authorization = None
        if user is not None:
            pair = f"{unquote(user)}:{unquote(password or '')}"
            authorization = f"Authorization: Basic {b64encode(pair.encode()).decode()}"
        return cls(urlunsplit(url._replace(netloc=host)), settings.git_branch, authorization)

    @property
    def key(self) -> str:
        """Names it in cursors and the state folder; the same when only credentials change."""
        return digest_of(self.address.encode()).removeprefix("sha256:")[:32]

    def call(self, settings: Settings, work: Path, *arguments: str) -> list[str]:
        """Runs git in a folder, for what goes over the network.

        Returns:
            The lines that it printed.

        Raises:
            TriggerError: it failed, or did not end within LLMOPS_GIT_TIMEOUT_SECONDS;
                nothing of it still runs.
        """
        lines: list[str] = []
        try:
            run_tool(
                "git",
                ["git", *OPTIONS, *arguments],
                work=work,
                log=Path(os.devnull),
                timeout_seconds=settings.git_timeout_seconds,
                environment=self._environment(work),
                on_line=lines.append,
            )
        except ToolError as error:
            raise TriggerError(
                f"The repository {self.address} cannot be read",
                expected=f"an answer within {settings.git_timeout_seconds:g} s",
                found=f"{error.problem}: {error.found}",
                cure="check LLMOPS_GIT_REPOSITORY, the network, and that "
                f"`git ls-remote {self.address}` answers here without asking for a password; "
                "pushes are caught up when it does",
            ) from error
        return lines

    def _environment(self, work: Path) -> dict[str, str]:
        environment = git_environment()
        for name in [name for name in environment if name.startswith("LLMOPS_")]:
            del environment[name]
        environment |= {
            "GIT_TERMINAL_PROMPT": "0",
            # While the mirror is empty, git would take a repository around it for its own.
            "GIT_CEILING_DIRECTORIES": str(work.parent),
            "GIT_ALLOW_PROTOCOL": ":".join(SCHEMES),  # not ext, which runs any command
        }
        environment.setdefault("GIT_ASKPASS", "")  # nor a window, if there is a display
        environment.setdefault("GIT_SSH_COMMAND", SSH_COMMAND)
        if self.authorization is not None:
            # The one way into git that no list of processes shows.
            count = int(environment.get("GIT_CONFIG_COUNT", "0"))
            url = urlsplit(self.address)
            environment |= {
                f"GIT_CONFIG_KEY_{count}": f"http.{url.scheme}://{url.netloc}/.extraHeader",
                f"GIT_CONFIG_VALUE_{count}": self.authorization,
                "GIT_CONFIG_COUNT": str(count + 1),
            }
        return environment


def _refused() -> SettingsError:
    return SettingsError(
        "LLMOPS_GIT_REPOSITORY cannot be used",
        expected="an absolute path, a URL with file://, https:// or ssh:// (without a password), "
        "or user@host:path",
        found="something else, not shown as it may hold a password",
        cure="correct it; keys of ssh and git's credential helpers work as for git itself",
    )
