"""What was asked for, and the job that it becomes on a site: data only, nothing is read or written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.launch_section import LaunchConfig
from configs.schema import Config
from launch.folder import RunFolder
from launch.profile import Profile

SITE = "site."


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`a.b=c` for the configuration, `key=value` for the profile), the latter given as `site.key=value`."""
    site = [word.removeprefix(SITE) for word in words if word.startswith(SITE)]
    return [word for word in words if not word.startswith(SITE)], site


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        config: path of the run's YAML file.
        overrides: `a.b=c` for the configuration and `site.key=value` for the profile, as they were typed.
        profile: name or path of the site profile.
        nodes: number of nodes.
        parity: whether the referee checks the layout before training.
    """

    config: str
    overrides: tuple[str, ...]
    profile: str
    nodes: int = 1
    parity: bool = False


@dataclass(frozen=True)
class Job:
    """What one run asks of a site. `folder`: where it was submitted, the job's working directory."""

    run: RunFolder
    site: Profile
    launch: LaunchConfig
    nodes: int
    folder: Path
    parity: bool = False

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.site.ranks_per_node

    @property
    def warning_s(self) -> int:
        """Seconds before the time limit at which USR1 comes."""
        return self.launch.checkpoint_s + self.launch.margin_s


@dataclass(frozen=True)
class PlannedRun:
    """A configuration and its job."""

    config: Config
    job: Job


def folder_of(config: Config) -> RunFolder:
    """The run folder that a configuration names."""
    return RunFolder(Path(config.run.dir) / config.run.name)


def place(config: Config, site: Profile, request: Request, folder: Path) -> Job:
    """The job of a configuration on a site, submitted from `folder`."""
    return Job(folder_of(config), site, config.launch, request.nodes, folder, request.parity)
