"""Doubles of TensorRT-LLM's tools, which need a GPU and cannot run where tests do.

They are written from what is known of TensorRT-LLM 1.2.1: flags, files, keys and failure
strings. They compute nothing. What they write says that it is by a double, and what they
print starts with it. They accept no flag that the real tool is not known to have, so that
a wrong command line fails here and not on a rented GPU.

They import the standard library only, and use these variables of the environment, which
`installation.install` can also write beside them, as the tool runner passes none on:

- `LLMOPS_DOUBLE_FAILS`: `<tool>:<failure>`, such as `trtllm-build:only_config`; the tools
  and failures are in `behaviour.FAILURES`.
- `LLMOPS_DOUBLE_COMPUTE_CAPABILITY`, `LLMOPS_DOUBLE_GPUS`, `LLMOPS_DOUBLE_VERSION`: the
  machine and the version that they pretend; 9.0, 8 and 1.2.1.
"""
