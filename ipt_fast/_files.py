"""Writing files so that a reader never sees half of one."""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator

from safetensors import SafetensorError

_NAME_BYTES = 255  # of file systems that do not say
_OPEN_FILES = ("/dev/fd", "/proc/self/fd")  # what this process has open, by number


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a temporary path (same suffix) whose content goes to ``path`` when the block succeeds.

    A file is replaced at once, and its successor has its permissions and, where the system allows it, its owner; a link
    is followed, and the file behind it replaced. A device or a FIFO stays what it is, and the content is written into
    it; so it is with a file that is this process's standard output or error. When the block raises, the temporary file
    is removed and whatever stood at ``path`` before is left as it was. The temporary name is short, so that ``path``
    may have the longest name that the file system allows.
    """
    path = pathlib.Path(path)
    suffix = path.suffix if len(path.suffix) <= 16 else ""
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = pathlib.Path(folder, f"content{suffix}")
            yield temporary
            descriptor = _descriptor_of(path)
            if descriptor is not None:
                for printed in filter(None, (sys.stdout, sys.stderr)):
                    printed.flush()  # it comes first
            target = path if descriptor is None else os.dup(descriptor)
            with temporary.open("rb") as content, open(target, "wb") as stream:
                shutil.copyfileobj(content, stream)
        return
    place = pathlib.Path(os.path.realpath(path))
    temporary = place.with_name(f".{secrets.token_hex(8)}{suffix}")
    try:
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            _keep_owner_and_mode(place.stat(), temporary)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system refuses while ``path`` is written becomes an OSError with the file's name.

    Libraries say it in kinds of their own, or fail once more where they close a file on a full disk.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError | SafetensorError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        named = OSError(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}")
        named.errno = getattr(cause, "errno", None)
        raise named from error


def make_folder(name: str, folder: str | os.PathLike[str]) -> None:
    """Make ``folder``, the argument ``name``, and raise ValueError unless files can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be written; got {folder} ({error.strerror})") from error


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a device, a FIFO or a file that is open for output, which is written to, never replaced."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    if stat.S_ISREG(mode):
        return _descriptor_of(path) is not None
    return not stat.S_ISDIR(mode)


def _descriptor_of(path: str | os.PathLike[str]) -> int | None:
    """The number by which this process writes to ``path`` already: only so do all that write share one position."""
    folder, name = os.path.split(os.path.abspath(path))
    if folder in _OPEN_FILES and name.isdigit():
        return int(name)
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(number)):
                return number
    return None


def _keep_owner_and_mode(before: os.stat_result, path: pathlib.Path) -> None:
    """As far as the user and the file system may."""
    with contextlib.suppress(OSError):
        os.chown(path, before.st_uid, before.st_gid)
    with contextlib.suppress(OSError):
        os.chmod(path, before.st_mode & 0o777)


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where the file system cannot hold a name as long as that of ``path``, which need not exist."""
    path = pathlib.Path(path)
    folder = next((parent for parent in path.absolute().parents if os.path.isdir(parent)), None)
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX") if folder else _NAME_BYTES
    except (OSError, ValueError, AttributeError):
        longest = _NAME_BYTES
    if len(os.fsencode(path.name)) > longest:
        raise ValueError(f"path must have a name of at most {longest} bytes; got {path}")


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that :func:`atomic_write` of killed programs left in ``folder``, a run's own."""
    for path in pathlib.Path(folder).glob(".*"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.(pth|csv|json|safetensors)", path.name):
            path.unlink(missing_ok=True)


def is_record(path: str | os.PathLike[str], *keys: str) -> bool:
    """Whether a file is empty, or JSON of an object that has these keys, as an earlier run of a command left it."""
    try:
        content = json.loads(pathlib.Path(path).read_bytes() or b"{}")
    except (ValueError, RecursionError):
        return False
    return content == {} or (isinstance(content, dict) and set(keys) <= content.keys())
