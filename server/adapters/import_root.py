"""The one folder of the server, and the one prefix of an object store, below which clients may name paths."""

from pathlib import Path

from server.errors import InvalidRequestError, NotFoundError

__all__ = ["ImportRoot", "check_s3_url"]


class ImportRoot:
    """Resolves paths that clients name.

    Args:
        root: None if no paths are taken.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root

    def folder(self, text: str) -> Path:
        """A folder below the root, links followed; `text` may be relative to it.

        Raises:
            InvalidRequestError: code `path_forbidden`, it is not below the root, or there is none.
            NotFoundError: code `path_not_found`.
        """
        if self._root is None:
            raise InvalidRequestError("paths are not taken: see --import-root", code="path_forbidden", param="path")
        try:
            root = self._root.resolve()
            path = (root / text).resolve()
            is_inside, is_folder = path.is_relative_to(root), path.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
            is_inside, is_folder = True, False
        if not is_inside:
            raise InvalidRequestError("the path leaves the import root", code="path_forbidden", param="path")
        if not is_folder:
            raise NotFoundError("there is no such folder", code="path_not_found", param="path")
        return path


def check_s3_url(url: str, root: str | None) -> None:
    """Refuse an address of an object store that is not below the root.

    Raises:
        InvalidRequestError: code `path_forbidden`.
    """
    if root is None:
        raise InvalidRequestError("object stores are not read: see --s3-root", code="path_forbidden", param="url")
    # Some stores keep objects in folders, to which these would mean what they mean there.
    has_dots = any(part in (".", "..", "") for part in url.removeprefix("s3://").rstrip("/").split("/"))
    if has_dots or not f"{url}/".startswith(root.rstrip("/") + "/"):
        raise InvalidRequestError("the address leaves the root (--s3-root)", code="path_forbidden", param="url")
