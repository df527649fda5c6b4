"""Pydantic AI's own rules for workspaces, and an agent that works in one."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from pydantic_ai.workspaces import WorkspaceBackend, WorkspaceRef
from pydantic_ai.workspaces.conformance import WorkspaceBackendSuite

from x07_sandbox import AsyncSandbox, Sandbox
from x07_sandbox.integrations.pydantic_ai import X07Workspace


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """The event loop of the tests."""
    return "asyncio"


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[X07Workspace]:
    """A workspace for most tests."""
    workspace = X07Workspace()
    await workspace.working_dir()
    yield workspace
    await destroy(workspace)


async def destroy(workspace: WorkspaceBackend) -> None:
    """End the sandbox of a workspace."""
    await (await AsyncSandbox.connect(workspace.ref.id)).kill()


class TestConformance(WorkspaceBackendSuite):
    """The rules, with all optional ones."""

    @pytest.fixture
    def backend(self, shared: X07Workspace) -> X07Workspace:
        """The workspace, for one rule."""
        return shared

    @pytest.fixture
    def fresh_backend(self) -> Iterator[Callable[[], X07Workspace]]:
        """Return new workspaces, whose sandboxes are killed after the test."""
        made: list[X07Workspace] = []

        def fresh() -> X07Workspace:
            made.append(X07Workspace())
            return made[-1]

        yield fresh
        still_open = {info.id for info in Sandbox.list()}
        for workspace in made:
            if workspace.ref is not None and workspace.ref.id in still_open:
                Sandbox.connect(workspace.ref.id).kill()

    @pytest.fixture
    def attach_backend(self) -> Callable[[WorkspaceRef], X07Workspace]:
        """Return how to connect to an open sandbox."""
        return X07Workspace

    @pytest.fixture
    def destroy_environment(self) -> Callable[[WorkspaceBackend], Awaitable[None]]:
        """Return how to end a sandbox."""
        return destroy
