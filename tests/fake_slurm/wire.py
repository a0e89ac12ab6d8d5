"""Frames between the clients and the controller: a length, then a marshalled value.

marshal and not json, because both ends are the same interpreter, bytes pass as they are,
and its import costs nothing: every squeue of a test pays for the imports made here."""

import marshal
import os

SOCKET = "controller.sock"


def pack(message):
    body = marshal.dumps(message)
    return len(body).to_bytes(4, "big") + body


class Frames:
    """Bytes in, whole messages out."""

    def __init__(self):
        self.buffer = bytearray()

    def feed(self, data):
        self.buffer += data
        messages = []
        while len(self.buffer) >= 4:
            size = int.from_bytes(self.buffer[:4], "big")
            if len(self.buffer) < 4 + size:
                break
            messages.append(marshal.loads(bytes(self.buffer[4:4 + size])))
            del self.buffer[:4 + size]
        return messages


def socket_address(folder_fd):
    """A socket's path may have 107 bytes; test folders are longer, their descriptors are not."""
    return "/proc/self/fd/%d/%s" % (folder_fd, SOCKET)


def state_folder(conf_path):
    return os.path.join(os.path.dirname(os.path.abspath(conf_path)), "state")
