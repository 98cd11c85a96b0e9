"""Checkpoints on torch DCP: single-device names, any layout to any layout. See docs/checkpoints.md.

manifest.py   what lies where: the JSON that makes a folder a checkpoint
folders.py    names, the atomic rename, `latest`, what is kept
staging.py    copy of a rank's states in host memory: all that training waits for
regroup.py    ZeRO's flat fragments <-> whole tensor-parallel shards, spread over data-parallel ranks
planner.py    storage.py    DCP's extension points: boxes of global tensors in raw files with hashes
checkpointer.py  find.py    save and load; which checkpoint to go on from
__main__.py   inspect, verify, reshard-plan, export
"""
