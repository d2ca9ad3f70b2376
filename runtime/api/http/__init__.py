"""HTTP below the endpoints: protocol, bodies, errors, server-sent events, access, records of requests."""
