"""A server for many callers of one model: continuous batching, the OpenAI protocol, a chat page."""
