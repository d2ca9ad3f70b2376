"""OpenAI's Responses API over the chats of the same server: items in, items out, and a store of both."""
