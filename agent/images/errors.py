"""What can go wrong with images."""

from __future__ import annotations

from agent.errors import AgentError


class ImageError(AgentError):
    """The image, or what it should be made of, is not usable."""

    code = "image.invalid"


class ImageNotFound(ImageError):
    code = "image.not_found"


class ImageBuildFailed(ImageError):
    """A package could not be had, or the disk refused."""

    code = "image.build_failed"
