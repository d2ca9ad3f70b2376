"""The endpoints that change the server: training jobs and adapters. Every handler sets ADMIN or TRAIN in `opt`."""
