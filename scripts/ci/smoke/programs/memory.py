"""Use 256 MiB of memory."""

block = bytearray(256 * 1024 * 1024)
for at in range(0, len(block), 4096):
    block[at] = 1
print("it got 256 MiB")
