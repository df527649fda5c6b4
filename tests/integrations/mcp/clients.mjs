// Use `x07 mcp` with the two TypeScript clients of MCP, as an editor does.
//   node clients.mjs v1|v2|tasks X07
// v1: @modelcontextprotocol/sdk. v2: @modelcontextprotocol/client, pinned to 2026-07-28.
// tasks: the messages of the Tasks extension, checked against the schemas of @modelcontextprotocol/ext-tasks.
import assert from "node:assert/strict";

const [which, x07] = process.argv.slice(2);
const server = { command: x07, args: ["mcp"], env: process.env };
const about = { name: "test", version: "1" };

async function connected() {
  if (which === "v1") {
    const { Client } = await import("@modelcontextprotocol/sdk/client/index.js");
    const { StdioClientTransport } = await import("@modelcontextprotocol/sdk/client/stdio.js");
    const client = new Client(about);
    await client.connect(new StdioClientTransport(server));
    return client;
  }
  const { Client } = await import("@modelcontextprotocol/client");
  const { StdioClientTransport } = await import("@modelcontextprotocol/client/stdio");
  const client = new Client(about, { versionNegotiation: { mode: { pin: "2026-07-28" } } });
  await client.connect(new StdioClientTransport(server));
  return client;
}

async function useTools() {
  const client = await connected();
  const call = async (name, args = {}, options = {}) => {
    const answer = await client.callTool({ name, arguments: args }, ...(which === "v1" ? [undefined] : []), options);
    return { error: answer.isError ?? false, texts: answer.content.map((block) => block.text) };
  };
  const { tools } = await client.listTools();
  assert.equal(tools.length, 10);
  const ran = await call("run_code", { language: "python", code: "print(6 * 7)" });
  assert.equal(JSON.parse(ran.texts[0]).outcome, "ok");
  assert.match(ran.texts[1], /\n42\n/);
  const { sandbox } = JSON.parse((await call("sandbox_open")).texts[0]);
  await call("sandbox_write", { sandbox, path: "a.txt", content: "hello" });
  assert.match((await call("sandbox_exec", { sandbox, command: "cat a.txt" })).texts[1], /\nhello\n/);
  const told = [];
  await call("sandbox_exec", { sandbox, command: "sleep 5" }, { onprogress: (one) => told.push(one.message) });
  assert.ok(told.includes("running, 0 bytes of output"), JSON.stringify(told));
  const refused = await call("sandbox_open", { policy: "built-in:default" });
  assert.ok(refused.error);
  assert.match(refused.texts[0], /fixed by the person who started this server/);
  const abort = new AbortController();
  const long = call("sandbox_exec", { sandbox, command: "echo $$ > pid; sleep 999" }, { signal: abort.signal });
  await call("sandbox_exec", { sandbox, command: "while [ ! -s pid ]; do sleep 0.1; done; kill -0 $(cat pid)" });
  abort.abort();
  await assert.rejects(long);
  const gone = { sandbox, command: "while kill -0 $(cat pid); do sleep 0.1; done; echo gone" };
  assert.match((await call("sandbox_exec", gone)).texts[1], /\ngone\n/);
  await call("sandbox_close", { sandbox });
  await client.close();
}

async function checkTasks() {
  const { spawn } = await import("node:child_process");
  const { createInterface } = await import("node:readline");
  const tasks = await import("@modelcontextprotocol/ext-tasks/core/v2");
  const child = spawn(server.command, server.args, { env: server.env, stdio: ["pipe", "pipe", "inherit"] });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const capabilities = { extensions: { "io.modelcontextprotocol/tasks": {} } };
  const _meta = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": about,
    "io.modelcontextprotocol/clientCapabilities": capabilities,
  };
  const ask = async (method, params = {}) => {
    child.stdin.write(JSON.stringify({ jsonrpc: "2.0", id: 1, method, params: { ...params, _meta } }) + "\n");
    for (;;) {
      const message = JSON.parse((await lines.next()).value);
      if (message.id === 1) return message.result ?? assert.fail(JSON.stringify(message));
    }
  };
  const discovered = await ask("server/discover");
  assert.ok(tasks.hasTaskServerCapabilityV2(discovered.capabilities));
  const created = await ask("tools/call", { name: "run_code", arguments: { language: "shell", code: "sleep 8" } });
  assert.ok(tasks.isCreateTaskResultV2(created), JSON.stringify(created));
  for (;;) {
    const state = await ask("tasks/get", { taskId: created.taskId });
    assert.ok(tasks.isDetailedTaskV2(state), JSON.stringify(state));
    if (state.status === "completed") {
      assert.equal(JSON.parse(state.result.content[0].text).outcome, "ok");
      break;
    }
    await new Promise((resolve) => setTimeout(resolve, created.pollIntervalMs));
  }
  assert.equal((await ask("tasks/cancel", { taskId: created.taskId })).resultType, "complete");
  child.stdin.end();
  assert.equal(await new Promise((resolve) => child.on("exit", resolve)), 0);
}

await (which === "tasks" ? checkTasks() : useTools());
console.log("ok");
