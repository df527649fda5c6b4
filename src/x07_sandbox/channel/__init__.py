"""The channel between host and guest agent: streams, messages and their order.

It imports only the standard library and `errors`.
"""
