// HTTP/1.1 as a message: what a connection has sent so far, read within limits; and answers as bytes.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace http {

constexpr std::size_t MOST_HEAD = 16 << 10;  // bytes of a request line and its headers
constexpr std::size_t MOST_HEADERS = 100;

struct Request {
    std::string method, path;                    // the path without its query
    std::map<std::string, std::string> headers;  // names in lower case
    std::string body;
    bool keep_alive = true;

    // A header's value; empty without it.
    std::string header(const std::string& name) const {
        const auto header = headers.find(name);
        return header == headers.end() ? std::string() : header->second;
    }
};

struct Head {
    Request request;
    std::size_t bytes = 0;    // of the head; 0: it has not arrived
    std::size_t length = 0;   // of the body behind it
    bool has_length = false;  // the head states it
    int refusal = 0;          // the status of the answer to a head that is none, after which nothing more is read
};

// Reads the head at the beginning of the bytes.
Head read_head(std::string_view bytes);

struct Response {
    int status = 200;
    std::string body;
    std::string type = "application/json";
    std::vector<std::pair<std::string, std::string>> headers = {};
};

// The answer as bytes; without `body` they end after the head.
std::string write(const Response& response, bool keep_alive, bool body = true);

}  // namespace http
