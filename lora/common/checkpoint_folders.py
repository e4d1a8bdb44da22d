"""The names of checkpoint folders: checkpoint_step_<N>."""


def checkpoints_by_step(folder):
    """{step: path} of the checkpoints in `folder`; a copy under any other name is none."""
    found = {
        path.name.removeprefix("checkpoint_step_"): path
        for path in folder.glob("checkpoint_step_*")
    }
    return {int(step): path for step, path in found.items() if step.isdecimal()}
