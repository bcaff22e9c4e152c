// Requests to this server's API, with the key if it needs one.

const KEY = "lorakit-key";

/** An answer of the server, or of the network, that is not what was asked for. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    // The login of a proxy in front of the server goes with each request, as it did with the page's files.
    response = await fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new ApiError(errorText(await response.text(), response.status), response.status);
  return response;
}

/** Return the message of an error in OpenAI's form, and the start of any other, such as a proxy's. */
function errorText(text, kind) {
  try {
    const { message } = JSON.parse(text).error;
    if (typeof message === "string" && message) return message;
  } catch {
    // It is not JSON, or has no error.
  }
  return `The server answered ${kind}: ${text.slice(0, 300)}`;
}

/** Return all models, the base first. */
export async function listModels() {
  return (await (await send("v1/models")).json()).data;
}

export function reportPath(model) {
  return `v1/reports/${model.split("/").map(encodeURIComponent).join("/")}`;
}

/** Return the HTML of the report of a model's run. */
export async function readReport(model) {
  return (await send(reportPath(model))).text();
}

function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** Return the classes of a text. */
export async function classify(body, signal) {
  const response = await post("v1/classify", body, signal);
  return { ...(await response.json()), receipt: response.headers.get("x-lorakit-adapter") };
}

/** Yield the events of a streamed answer as objects. A stream that is cut, or ends in an error, throws. */
export async function* stream(path, body, signal) {
  const response = await post(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError("The connection ended before the answer did.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event.startsWith(":")) continue; // a comment, of a replica that takes over or of a proxy
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const content = JSON.parse(data);
        if (content.error) throw new ApiError(errorText(data, "with an error"));
        yield content;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection ended before the answer did.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
