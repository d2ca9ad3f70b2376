"""Stored responses of /v1/responses: what went in and what came out, under the id that the client has."""
