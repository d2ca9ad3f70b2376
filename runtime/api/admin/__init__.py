"""The endpoints that change the server: training jobs and adapters. Every handler says `opt={ADMIN: True}`."""
