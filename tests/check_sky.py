"""Reads the files under cloud/ with SkyPilot's own parser, without an account or a network.

`tests/test_cloud.py` runs it with the Python that has SkyPilot, which need not be the one that has torch.
"""

import json
import sys

import sky
import yaml
from sky.volumes import volume


def described(path: str) -> dict[str, object]:
    """What SkyPilot understood; it raises on unknown fields and values. Prices and offers it would look up online."""
    with open(path, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    if "type" in content:
        config = volume.Volume.from_yaml_config(content)
        return {"kind": "volume", "name": config.name, "cloud": config.cloud, "zone": config.zone}
    task = sky.Task.from_yaml(path)
    return {
        "kind": "task",
        "resources": sorted({f"{r.cloud} {'spot' if r.use_spot else 'on demand'}" for r in task.resources}),
        "zones": sorted({str(r.zone) for r in task.resources}),
        "mounted": sorted([*task.storage_mounts, *task.volumes]),
        "volumes": sorted(map(str, task.volumes.values())),
    }


if __name__ == "__main__":
    print(json.dumps({path: described(path) for path in sys.argv[1:]}))
