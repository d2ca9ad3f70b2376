// The npm packages `openai`, and `ai` with `@ai-sdk/openai-compatible`.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import OpenAI, { NotFoundError } from "openai";
import { z } from "zod";

const url = `${process.env.EFT_URL}/v1`;
const model = process.env.EFT_MODEL_NAME;
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const provider = createOpenAICompatible({ name: "eft", baseURL: url, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true });
const messages = [{ role: "user", content: "Name a colour." }];
const colour = z.object({ name: z.string().max(20), red: z.number().int().min(0).max(255) });

test("chat, whole and as a stream", async () => {
  const asked = { model, messages, max_tokens: 12, temperature: 0 };
  const whole = await client.chat.completions.create(asked);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(text, whole.choices[0].message.content);
  const runner = client.chat.completions.stream(asked);
  assert.equal((await runner.finalChatCompletion()).choices[0].message.content, text);
});

test("completions, models, errors", async () => {
  assert.ok((await client.completions.create({ model, prompt: "Once", max_tokens: 4 })).choices[0].text);
  assert.equal((await client.models.retrieve(model)).id, model);
  await assert.rejects(client.models.retrieve("no-such-model"), NotFoundError);
});

test("a tool", async () => {
  const parameters = { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"] };
  const answer = await client.chat.completions.create({
    model, messages, max_tokens: 200, temperature: 0, tool_choice: "required",
    tools: [{ type: "function", function: { name: "get_weather", description: "Weather.", parameters } }],
  });
  assert.equal(typeof JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments).city, "string");
});

test("embeddings and responses", async () => {
  const found = await client.embeddings.create({ model, input: ["a", "b"] });
  assert.equal(found.data.length, 2);
  const answer = await client.responses.create({ model, input: "Say hello.", max_output_tokens: 16, temperature: 0 });
  assert.ok(answer.output_text);
});

test("generateText and streamText", async () => {
  const whole = await generateText({ model: provider(model), prompt: "Name a colour.", maxOutputTokens: 12, temperature: 0 });
  assert.ok(whole.text);
  assert.ok(whole.usage.outputTokens > 0);
  const stream = streamText({ model: provider(model), prompt: "Name a colour.", maxOutputTokens: 12, temperature: 0 });
  let text = "";
  for await (const part of stream.textStream) text += part;
  assert.equal(text, whole.text);
});

test("generateText with a tool that is required", async () => {
  const weather = tool({ description: "Weather.", inputSchema: z.object({ city: z.string().max(20) }), execute: async () => "Snow." });
  const answer = await generateText({
    model: provider(model), prompt: "The weather in Oslo?", tools: { weather }, toolChoice: "required", maxOutputTokens: 200, temperature: 0,
  });
  assert.equal(answer.toolCalls[0].toolName, "weather");
  assert.equal(answer.toolResults[0].output, "Snow.");
});

test("generateObject", async () => {
  const answer = await generateObject({ model: provider(model), schema: colour, prompt: "Describe red.", maxOutputTokens: 200, temperature: 0 });
  assert.ok(colour.safeParse(answer.object).success);
});
