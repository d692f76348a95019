"""Lengths of the lines: what is longer is refused by the side that would send it, and ends the link if it comes."""

from __future__ import annotations

#: An adapter's tensor index has at most 16 MiB in its header (`shared.adapter_file`), and more here, with escapes.
MAX_REQUEST_BYTES = 128 * 2**20
MAX_ANSWER_BYTES = 2**20
#: Bytes that may follow the line of a request (`payload`): a part of an adapter, on its way to another host.
MAX_PAYLOAD_BYTES = 4 * 2**20
