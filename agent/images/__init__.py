"""Guest images: made from Debian's packages or from files, kept with checksums, found by name.

::

    build_image("/var/lib/reeve/images", name="debian", progress=print)
    image = load_image("/var/lib/reeve/images/debian")
    KernelBoot(kernel=image.kernel, ramdisk=image.ramdisk, cmdline=image.cmdline)
"""

from agent.images.build import DEFAULT_CMDLINE, build_image
from agent.images.errors import ImageBuildFailed, ImageError, ImageNotFound
from agent.images.initramfs import READY
from agent.images.store import Image, ImageFile, list_images, load_image, verify_image

__all__ = [
    "DEFAULT_CMDLINE",
    "READY",
    "Image",
    "ImageBuildFailed",
    "ImageError",
    "ImageFile",
    "ImageNotFound",
    "build_image",
    "list_images",
    "load_image",
    "verify_image",
]
