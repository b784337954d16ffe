"""A file that appears whole or not at all."""

import contextlib
import os


@contextlib.contextmanager
def whole_file(path, mode="wb", sync=False, **how):
    """An open file that takes the place of `path` at the end; after a crash or on a full disk the old one stays.

    sync: the content is on the disk before it does. The folder is made if it is not there.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode, **how) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
