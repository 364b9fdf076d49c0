"""A real Ray cluster of several nodes, all on this machine."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"
)


class Nodes:
    """A head node that takes the driver, and nodes for the workers, which may be killed."""

    def __init__(self) -> None:
        utils: Any = importlib.import_module("ray.cluster_utils")
        self.cluster = utils.Cluster()
        self.add(include_dashboard=False)
        self.address: str = self.cluster.address

    def add(self, **options: Any) -> Any:
        """A node of one core, which does not know the database's password."""
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("PGPASSFILE", raising=False)
            return self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, **options)

    def lose(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)
