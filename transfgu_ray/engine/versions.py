"""The code that this process and the nodes of a cluster run, compared before any work."""

from typing import Any

from transfgu_ray.errors import ConfigError

# Nodes that do not answer by then are left out: they start a process for it.
_ANSWER_S = 60.0


def require_same_code() -> None:
    """Compare the package and the libraries that decide on results here and on each node of the cluster.

    Nodes that join later are not compared, nor those that are too busy to answer.

    Raises:
        ConfigError: they differ, or a node lacks the package.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def found() -> dict[str, str]:
        # Sent by value: the node may have another version of this module, or none.
        import hashlib
        import importlib.metadata
        import importlib.util
        from pathlib import Path

        spec = importlib.util.find_spec("transfgu_ray")
        if spec is None or spec.origin is None:
            return {"transfgu_ray": "none"}
        code = hashlib.sha256()
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            code.update(path.read_bytes())
        versions = {"transfgu_ray": f"code {code.hexdigest()[:8]} in {Path(spec.origin).parent}"}
        for name in ("torch", "timm"):
            try:
                # Builds for CPU and CUDA differ in what follows the plus.
                versions[name] = importlib.metadata.version(name).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "none"
        return versions

    nodes: list[Any] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # no types there
    task = ray.remote(num_cpus=0)(found)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(): node
        for node in nodes
    }
    here = found()
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    for answer in done:
        try:
            there = ray.get(answer)
        # It was lost in the meantime: whatever runs there does so elsewhere.
        except ray.exceptions.RayError:
            continue
        for name, version in here.items():
            # Where the package lies does not matter.
            if there.get(name, "none").partition(" in ")[0] != version.partition(" in ")[0]:
                raise ConfigError(
                    f"node {asked[answer]['NodeManagerAddress']} of the cluster has {name} {there.get(name, 'none')}, "
                    f"this process {version}; install the same on all, or submit a job with --working-dir"
                )
