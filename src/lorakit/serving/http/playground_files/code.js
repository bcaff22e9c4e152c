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

function lorakit(request, base) {
  const { body } = plain(request);
  const weights = body.lora ?? (body.model === base ? {} : { [body.model]: 1 });
  const names = Object.keys(weights);
  const choice = body.lora ? python(weights) : python(names[0]);
  const sampling = body.temperature
    ? [
        "    do_sample=True,",
        `    temperature=${body.temperature},`,
        `    top_p=${body.top_p ?? 1},`,
        `    top_k=${body.top_k ?? 0},`,
      ]
    : ["    do_sample=False,"];
  const inputs = body.messages
    ? [
        `messages = ${python(body.messages)}`,
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
      ]
    : [`inputs = tokenizer(${python(body.prompt)}, return_tensors="pt")`];
  return [
    ...(body.temperature ? ["import torch", ""] : []),
    "import lorakit",
    "",
    `base = lorakit.load_base(${python(base)})`,
    "model, tokenizer = base.model, base.tokenizer",
    ...names.map((name) => `adapters = lorakit.load(model, ${python(`path/to/${name}`)}, name=${python(name)})`),
    ...(names.length ? [`adapters.activate(${choice})`] : []),
    ...inputs,
    ...(body.temperature ? [`torch.manual_seed(${body.seed})  # the server draws other numbers from the same seed`] : []),
    "output = model.generate(",
    "    **inputs,",
    `    max_new_tokens=${body.max_tokens ?? body.max_completion_tokens},`,
    ...sampling,
    ")",
    'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    "",
  ].join("\n");
}

/** Return a request as code in a language: curl, openai or lorakit. */
export function code(language, request, { base, hasKey }) {
  const address = location.origin;
  if (language === "lorakit") return lorakit(request, base);
  return (language === "curl" ? curl : openai)(request, address, hasKey);
}
