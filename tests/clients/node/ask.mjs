// Asks a question with one of Node's client libraries: `node ask.mjs LIBRARY WAY`, with
// {url, key, model, question} on standard input. Prints what came as JSON:
// {pieces, prompt_tokens, output_tokens}, {total} or {error}.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [library, way] = process.argv.slice(2);
let input = "";
for await (const part of process.stdin) input += part;
const { url, key, model, question } = JSON.parse(input);

const Sum = z.object({ total: z.number().int().min(0).max(999) });
const Terms = z.object({ a: z.number().int(), b: z.number().int() });
const add = ({ a, b }) => String(a + b);

function openai() {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
  const chat = client.chat.completions;
  const asked = { model, messages: [{ role: "user", content: question }], temperature: 0 };
  const told = (pieces, usage) => ({
    pieces,
    prompt_tokens: usage?.prompt_tokens,
    output_tokens: usage?.completion_tokens,
  });
  return {
    async chat() {
      const got = await chat.create(asked);
      return told([got.choices[0].message.content], got.usage);
    },
    async stream() {
      const pieces = [];
      let usage;
      const options = { stream: true, stream_options: { include_usage: true } };
      for await (const chunk of await chat.create({ ...asked, ...options })) {
        if (chunk.choices[0]?.delta.content) pieces.push(chunk.choices[0].delta.content);
        usage = chunk.usage ?? usage;
      }
      return told(pieces, usage);
    },
    async call() {
      const parameters = z.toJSONSchema(Terms);
      const runner = chat.runTools({
        ...asked,
        stream: true,
        tools: [
          { type: "function", function: { name: "add", parameters, parse: JSON.parse, function: add } },
        ],
      });
      return told([await runner.finalContent()]);
    },
    async parse() {
      const format = zodResponseFormat(Sum, "sum");
      return (await chat.parse({ ...asked, response_format: format })).choices[0].message.parsed;
    },
  };
}

function aiSdk() {
  const provider = createOpenAICompatible({
    name: "shoal",
    baseURL: `${url}/v1`,
    apiKey: key,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  const asked = { model: provider(model), prompt: question, temperature: 0, maxRetries: 0 };
  const told = (pieces, usage) => ({
    pieces,
    prompt_tokens: usage.inputTokens,
    output_tokens: usage.outputTokens,
  });
  return {
    async chat() {
      const got = await generateText(asked);
      return told([got.text], got.usage);
    },
    async stream() {
      const pieces = [];
      const got = streamText({
        ...asked,
        onError({ error }) {
          throw error;
        },
      });
      for await (const piece of got.textStream) pieces.push(piece);
      return told(pieces, await got.usage);
    },
    async call() {
      const tools = { add: tool({ inputSchema: Terms, execute: async (terms) => add(terms) }) };
      const got = streamText({ ...asked, tools, stopWhen: stepCountIs(2) });
      let text = "";
      for await (const piece of got.textStream) text += piece;
      return told([text], await got.usage);
    },
    async parse() {
      return (await generateText({ ...asked, output: Output.object({ schema: Sum }) })).output;
    },
  };
}

try {
  console.log(JSON.stringify(await { openai, "ai-sdk": aiSdk }[library]()[way]()));
} catch (error) {
  const status = error.status ?? error.statusCode;
  console.log(JSON.stringify({ error: { name: error.constructor.name, status, message: error.message } }));
}
