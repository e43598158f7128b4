# Everything a newcomer needs: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard proto/twotower/v1/*.proto)

.PHONY: setup demo test lint format proto proto-check

proto:  ## Regenerate the committed gRPC stubs
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=services --grpc_python_out=services \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --mypy_out=services $(PROTOS)
