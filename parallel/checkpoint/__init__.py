"""Checkpoints on torch DCP: single-device names, any layout to any layout. See docs/checkpoints.md.

The files themselves, manifest and folders, are described and read in hope/stored/, with torch alone.

saving.py  resume.py         when a run saves, and where it starts from
checkpointer.py  find.py     save and load; which checkpoint to resume from
staging.py                   copy of a rank's states in host memory: all that training waits for
regroup.py                   ZeRO's flat fragments <-> whole tensor-parallel shards, spread over data-parallel ranks
format/planner.py storage.py DCP's extension points: boxes of global tensors in raw files with hashes
export.py                    weights alone, as hope/pretrained.py reads them
__main__.py                  inspect, verify, reshard-plan, export
"""
