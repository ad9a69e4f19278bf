"""The databases of Dagster and MLflow, each made once, by one process, before any server.

Two processes that initialise one fresh SQLite `DAGSTER_HOME` corrupt it
(https://github.com/dagster-io/dagster/issues/27390). Both databases are made beside
their place and renamed, so that a kill half way leaves nothing that looks finished.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmops_assets.errors import StackError
from llmops_assets.settings import Settings

TIMEOUT_SECONDS = 180.0
DAGSTER_CONFIGURATION = Path(__file__).with_name("dagster.yaml")


def mlflow_database(settings: Settings) -> Path:
    """The file of MLflow's database."""
    return settings.state / "mlflow" / "mlflow.db"


def prepare_databases(settings: Settings, environment: Mapping[str, str]) -> None:
    """Makes the databases that do not exist, and brings `dagster.yaml` up to date.

    Raises:
        StackError: Dagster or MLflow could not make its database.
    """
    home = settings.dagster_home
    home_beside = home.with_name(home.name + ".new")
    database = mlflow_database(settings)
    database_beside = database.with_name(database.name + ".new")
    making: list[tuple[Path, Path, subprocess.Popen[bytes]]] = []
    if not home.is_dir():
        shutil.rmtree(home_beside, ignore_errors=True)
        home_beside.mkdir(parents=True)
        shutil.copyfile(DAGSTER_CONFIGURATION, home_beside / "dagster.yaml")
        command = [sys.executable, "-m", "llmops_assets.local.databases", str(home_beside)]
        making.append((home_beside, home, _start(command, environment)))
    else:
        _replace(DAGSTER_CONFIGURATION, home / "dagster.yaml")
    if not database.is_file():
        database.parent.mkdir(parents=True, exist_ok=True)
        for leftover in database.parent.glob(database_beside.name + "*"):
            leftover.unlink()
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{database_beside}"]
        making.append((database_beside, database, _start(command, environment)))
    try:
        for beside, place, process in making:
            _finish(process, place)
            beside.rename(place)
    finally:
        for _, _, process in making:
            if process.poll() is None:
                process.kill()
                process.wait()


def make_dagster_storages(home: Path) -> None:
    """Opens a fresh `DAGSTER_HOME` once, which creates its databases."""
    from dagster import DagsterInstance

    with DagsterInstance.from_config(str(home)) as instance:
        # Storages are opened lazily; each of these asks one of the three.
        instance.get_runs(limit=1)
        instance.all_asset_keys()
        instance.all_instigator_state()


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _finish(process: subprocess.Popen[bytes], place: Path) -> None:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise StackError(
            f"The database {place} was not made within {TIMEOUT_SECONDS:.0f} s",
            cure="run `llmops up` again when the machine is less busy",
        ) from error
    if process.returncode != 0:
        raise StackError(
            f"The database {place} could not be made",
            expected="exit code 0",
            found=f"exit code {process.returncode}; {output.decode(errors='replace')[-1500:]}",
            cure="mend the cause and run `llmops up` again",
        )


def _replace(source: Path, target: Path) -> None:
    beside = target.with_name(target.name + ".new")
    shutil.copyfile(source, beside)
    beside.replace(target)


if __name__ == "__main__":
    make_dagster_storages(Path(sys.argv[1]))
