"""Saved domains in Xen's own format: libxl's stream (version 2) around libxc's (version 3; 2 is read too).

Pure: bytes to records and back, nothing of machines. Sources: Xen's docs/specs/libxl-migration-stream.pandoc,
libxc-migration-stream.pandoc, and tools/xl/xl_vmcontrol.c for what `xl` writes before both::

    xl header      domain configuration (JSON)                   `envelope`
    libxl header   LIBXC_CONTEXT                                 `envelope`
      libxc header   static records, pages, contexts, END        `libxc`, `records`
    libxl END                                                    `envelope`

Everything that is read is bounded and checked, for it may come from anywhere: `StreamInvalid` says what is wrong and
at which byte, `StreamUnsupported` that it is of a kind or version that is not known here.
"""
