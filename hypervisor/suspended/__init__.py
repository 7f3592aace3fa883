"""A suspended guest, apart from the machine it ran on: taken from one, put into another.

A guest that has called SCHEDOP_shutdown(SHUTDOWN_suspend) knows that it may wake elsewhere: under another domain
number, on other machine frames, with other event channels and grants. What is needed then is its pages by page number,
with page numbers in its page tables too, and a `GuestState`.

* `capture`: machine → state, and its pages in that form
* `rebuild`: state, and memory that holds such pages → machine; where the pages come from does not matter
* `transfer`: both to and from a libxc stream
"""
