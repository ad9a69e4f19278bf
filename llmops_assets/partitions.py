"""The partitions of the asset graph: one key a release, and one a model for its route."""

from __future__ import annotations

import dagster as dg

RELEASES = dg.DynamicPartitionsDefinition(name="releases")
"""Release keys, see `release.Release`. One release is one column through the graph."""

MODELS = dg.DynamicPartitionsDefinition(name="models")
"""Model names; only `production_route` is partitioned by them."""
