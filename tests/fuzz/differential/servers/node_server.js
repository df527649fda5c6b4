// Node's HTTP servers: strict, lax, and HTTP/2. Started with an address and three ports. Each request is a line on
// standard output.
"use strict";
const fs = require("fs");
const http = require("http");
const http2 = require("http2");
const [address, strictPort, laxPort, http2Port] = process.argv.slice(2);

function record(label, request) {
  const hosts = [];
  for (let at = 0; at < request.rawHeaders.length; at += 2) {
    if (["host", ":authority"].includes(request.rawHeaders[at].toLowerCase())) hosts.push(request.rawHeaders[at + 1]);
  }
  const fields = [label, "200", hosts.join(","), "-", `${request.method} ${request.url} HTTP`];
  fs.writeSync(1, fields.map((field) => JSON.stringify(String(field)).slice(1, -1)).join("\t") + "\n");
}

function serve(label, port, options, upgrades) {
  const server = http.createServer(options, (request, response) => {
    record(label, request);
    request.resume();
    response.end("ok\n");
  });
  server.keepAliveTimeout = 3000;
  server.on("connect", (request, socket) => {
    record(label, request);
    socket.on("error", () => {});
    socket.end("HTTP/1.1 200 OK\r\n\r\n");
  });
  if (upgrades) {
    server.on("upgrade", (request, socket) => {
      record(label, request);
      socket.on("error", () => {});
      const accepted = request.url.startsWith("/ws");
      if (accepted) socket.write("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
      else socket.end("HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
      socket.resume();
    });
  }
  server.on("clientError", (_error, socket) => socket.destroy());
  server.listen(Number(port), address);
}

serve("node", strictPort, {}, true);
serve("node-lax", laxPort, { insecureHTTPParser: true, requireHostHeader: false, keepAlive: true }, false);
const second = http2.createServer({}, (request, response) => {
  record("node-h2", request);
  response.end("ok\n");
});
second.on("sessionError", () => {});
second.listen(Number(http2Port), address);
process.on("uncaughtException", () => {});
