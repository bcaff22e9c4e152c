// A request as code: curl, the openai client, and lorakit in Python.

const EXTRA = ["lora", "top_k", "base_logprobs"]; // not of OpenAI's API

/** Return a JSON value as a Python literal. */
function python(value) {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([k, v]) => `${python(k)}: ${python(v)}`).join(", ")}}`;
  }
  // JSON's escapes are Python's, but for half characters, which JSON.stringify escapes as Python does.
  return JSON.stringify(value);
}

function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** Return a request without what only this page needs. */
function plain({ path, body }) {
  const { stream, stream_options, logprobs, base_logprobs, ...rest } = body;
  return { path, body: rest };
}

function curl(request, address, hasKey) {
  const { path, body } = plain(request);
  const key = hasKey ? ' -H "Authorization: Bearer $KEY"' : "";
  return `curl ${address}/${path}${key} -H 'Content-Type: application/json' \\\n  -d ${shell(JSON.stringify(body))}\n`;
}

function openai(request, address, hasKey) {
  const { path, body } = plain(request);
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => EXTRA.includes(name)));
  const own = Object.entries(body).filter(([name]) => !EXTRA.includes(name));
  const lines = own.map(([name, value]) => `    ${name}=${python(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra)},`);
  const isChat = path.endsWith("chat/completions");
  const method = isChat ? "client.chat.completions.create" : "client.completions.create";
  const text = isChat ? "choices[0].message.content" : "choices[0].text";
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(`${address}/v1`)}, api_key=${hasKey ? 'os.environ["KEY"]' : '"none"'})`,
    `answer = ${method}(`,
    ...lines,
    ")",
    `print(answer.${text}, answer.system_fingerprint)`,
    "",
  ].join("\n");
}

/** Return what the server computes, as lorakit's own functions. */
function lorakit(request, base, dtype) {
  const { body } = plain(request);
  const names = body.lora ? Object.keys(body.lora) : body.model === base ? [] : [body.model];
  const decoding = [`max_new_tokens=${body.max_tokens ?? body.max_completion_tokens}`];
  if (body.temperature) {
    decoding.push(...["temperature", "top_p", "top_k"].filter((name) => body[name]).map((name) => `${name}=${body[name]}`));
    decoding.push(`seed=${Math.abs(body.seed)}`);
  }
  const prompt = body.messages
    ? [
        "template = ChatTemplate(tokenizer)",
        `messages = template.prepared(${python(body.messages)})`,
        "prompt = template.ids(messages, answer=True)",
      ]
    : [`prompt = prompt_ids(tokenizer, ${python(body.prompt)})`];
  const ends = body.messages ? ", stop_ids=Chat.stop_ids(tokenizer)" : "";
  const cut = body.stop ? `.split(${python(body.stop[0])})[0]` : "";
  return [
    "import lorakit",
    ...(body.lora ? ["from lorakit.adapters import handle_of"] : []),
    ...(names.length
      ? ["from lorakit.compute.adapted import add_adapter", "from lorakit.compute.adapter_file import AdapterFile"]
      : []),
    "from lorakit.evaluation.decoding import Decoding",
    "from lorakit.evaluation.generate import generate",
    ...(body.messages
      ? ["from lorakit.tasks import Chat", "from lorakit.tasks.chat_template import ChatTemplate"]
      : ["from lorakit.tasks.language_modelling import prompt_ids"]),
    "",
    `base = lorakit.load_base(${python(base)}${dtype ? `, dtype=${python(dtype)}` : ""})`,
    "model, tokenizer = base.model, base.tokenizer",
    // An adapter may have a tokenizer of its own, with another chat template.
    ...names.map((name) => `tokenizer = add_adapter(base, AdapterFile.read(${python(`path/to/${name}`)}), name=${python(name)})`),
    ...(body.lora ? [`handle_of(model).activate(${python(body.lora)})`] : []),
    ...prompt,
    ...(body.temperature ? ["# The server draws other numbers from the same seed."] : []),
    `decoding = Decoding(${decoding.join(", ")})`,
    `(text,) = generate(model, tokenizer, [prompt], decoding${ends})`,
    `print(text${cut})`,
    "",
  ].join("\n");
}

/** Return a request as code in a language: curl, openai or lorakit. */
export function code(language, request, { base, dtype, hasKey }) {
  const address = new URL(".", location).href.replace(/\/$/, ""); // with the path below which a proxy has the page
  if (language === "lorakit") return lorakit(request, base, dtype);
  return (language === "curl" ? curl : openai)(request, address, hasKey);
}
