"""A code location with one job, whose only step waits in a pool of one."""

# No `from __future__ import annotations`: Dagster reads the context's annotation.

import time

import dagster as dg


@dg.op(pool="one", config_schema={"seconds": dg.Field(float, default_value=0.0)})
def wait(context: dg.OpExecutionContext) -> None:
    time.sleep(context.op_config["seconds"])


@dg.job(executor_def=dg.in_process_executor)
def waiting() -> None:
    wait()


defs = dg.Definitions(jobs=[waiting])
