"""Messages on the loopback interface, with the time at which each was sent: what goes between client, proxy and servers is measured
from outside, and nothing stands in its way. Only packets from or to the given ports are taken. Needs CAP_NET_RAW and CAP_NET_ADMIN."""

import ctypes
import socket
import struct

from clusters import Failed

# linux/if_ether.h, linux/if_packet.h, asm-generic/socket.h
ETH_P_IP, SOL_PACKET, PACKET_STATISTICS = 0x0800, 263, 6
SO_ATTACH_FILTER, SO_RCVBUFFORCE, SO_TIMESTAMPNS = 26, 33, 35
BUFFER = 256 << 20


def filter_of(ports):
    """Classic BPF over an IPv4 packet: TCP's first two fields are its ports."""
    program = [(0xB1, 0, 0, 0)]  # x = length of the IP header
    checks = [(offset, port) for port in ports for offset in (0, 2)]
    for number, (offset, port) in enumerate(checks):
        left = 2 * (len(checks) - number - 1)
        program += [(0x48, 0, 0, offset), (0x15, left + 1, 0, port)]
    return program + [(0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF)]


class Tap:
    """From `start` on packets wait in a buffer of the kernel; `packets` empties it."""

    def __init__(self, ports):
        try:
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        except PermissionError as error:
            raise Failed(f"packets cannot be seen ({error}): run it as root") from error
        program = filter_of(ports)
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
        head = struct.pack("HP", len(program), ctypes.addressof(code))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, head)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def start(self):
        self.socket.bind(("lo", ETH_P_IP))

    def packets(self):
        """[(seconds, sender's port, receiver's port, payload)] in their order; packets without payload are left out."""
        found = []
        while True:
            try:
                packet, ancillary, _, _ = self.socket.recvmsg(0xFFFF, 64, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            seconds, nanoseconds = next(struct.unpack("qq", data) for _, kind, data in ancillary if kind == SO_TIMESTAMPNS)
            ip = 4 * (packet[0] & 0xF)
            length = struct.unpack_from("!H", packet, 2)[0]
            sender, receiver = struct.unpack_from("!HH", packet, ip)
            payload = packet[ip + 4 * (packet[ip + 12] >> 4):length]
            if payload:
                found.append((seconds + nanoseconds / 1e9, sender, receiver, payload))
        _, dropped = struct.unpack("II", self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self.socket.close()
        if dropped:
            raise Failed(f"{dropped} packets were lost: measure for a shorter time")
        return sorted(found, key=lambda packet: packet[0])
