"""What setup.cfg cannot say: the native fast path, which is left out where there is no C compiler."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "hypervisor.native._fastpath",
            ["hypervisor/native/fastpath.c"],
            depends=["hypervisor/native/tables.h", "hypervisor/native/updates.h"],
            extra_compile_args=["-O2", "-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra"],
            optional=True,
        )
    ]
)
