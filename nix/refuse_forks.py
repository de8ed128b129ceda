"""Started by the self-hosted runner before each job: a job from a fork fails here, unstarted.

The workflow keeps forks off the GPU labels too, but a fork can edit a workflow, and not this.
Argument: OWNER/NAME, the one repository whose jobs may run.
"""

import json
import os
import sys
from pathlib import Path

OWN = ("push", "schedule", "workflow_dispatch", "merge_group")
"""Events that only somebody with write access can cause."""


def refusal(repository: str, environment: dict[str, str]) -> str:
    """Why the job that ``environment`` describes may not run; empty if it may."""
    if environment.get("GITHUB_REPOSITORY") != repository:
        return f"this machine serves {repository} only"
    event = environment.get("GITHUB_EVENT_NAME", "")
    if event in OWN:
        return ""
    if event != "pull_request":
        return f"event {event!r} can be caused by strangers"
    try:
        payload = json.loads(Path(environment["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
        head = payload["pull_request"]["head"]["repo"]["full_name"]
    except (KeyError, TypeError, OSError, ValueError):
        # A deleted fork has no repository; what cannot be read is not trusted.
        return "the pull request names no repository"
    return "" if head == repository else f"the pull request comes from {head}"


if __name__ == "__main__":
    if why := refusal(sys.argv[1], dict(os.environ)):
        sys.exit(f"refused: {why}; push a branch to {sys.argv[1]} to run it on a GPU")
