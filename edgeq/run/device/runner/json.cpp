#include "json.hpp"

#include <cstdio>
#include <stdexcept>

namespace edgeq {
namespace {

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Json all() {
    Json found = value();
    if (peek() != '\0') fail();
    return found;
  }

 private:
  const std::string& text_;
  size_t at_ = 0;

  [[noreturn]] void fail() const { throw std::runtime_error("no JSON at byte " + std::to_string(at_)); }

  char peek() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) at_++;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool took(char one) {
    if (peek() != one) return false;
    at_++;
    return true;
  }

  void need(char one) {
    if (!took(one)) fail();
  }

  Json value() {
    Json made;
    if (took('{')) {
      while (!took('}')) {
        if (!made.members.empty()) need(',');
        if (peek() != '"') fail();
        std::string name = string();
        need(':');
        made.members.emplace_back(name, value());
      }
    } else if (took('[')) {
      while (!took(']')) {
        if (!made.items.empty()) need(',');
        made.items.push_back(value());
      }
    } else if (peek() == '"') {
      made.text = string();
    } else {
      size_t end = text_.find_first_of(" \t\r\n,]}", at_);
      made.text = text_.substr(at_, end - at_);
      if (made.text.empty()) fail();
      at_ += made.text.size();
    }
    return made;
  }

  std::string string() {
    std::string made;
    for (at_++; at_ < text_.size() && text_[at_] != '"'; at_++) {
      if (text_[at_] != '\\') {
        made += text_[at_];
        continue;
      }
      const std::string from = "bfnrt", to = "\b\f\n\r\t";
      char kind = at_ + 1 < text_.size() ? text_[++at_] : '\0';
      size_t known = from.find(kind);
      if (kind == 'u')
        made += utf8(code());
      else
        made += known == std::string::npos ? kind : to[known];
    }
    if (at_ == text_.size()) fail();
    at_++;
    return made;
  }

  // The character of \uXXXX, at whose u this stands, or of two of them; stays at the last digit.
  unsigned code() {
    unsigned first = digits();
    if (first < 0xD800 || first > 0xDBFF || text_.compare(at_ + 1, 2, "\\u") != 0) return first;
    at_ += 2;
    return 0x10000 + ((first - 0xD800) << 10) + (digits() - 0xDC00);
  }

  unsigned digits() {
    unsigned made = unsigned(std::stoul(text_.substr(at_ + 1, 4), nullptr, 16));
    at_ += 4;
    return made;
  }

  static std::string utf8(unsigned code) {
    std::string made;
    if (code < 0x80) return {char(code)};
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    made += char((more == 1 ? 0xC0 : more == 2 ? 0xE0 : 0xF0) | code >> (6 * more));
    while (more--) made += char(0x80 | (code >> (6 * more) & 0x3F));
    return made;
  }
};

}  // namespace

Json Json::parse(const std::string& text) { return Parser(text).all(); }

const Json& Json::operator[](const std::string& name) const {
  for (auto& [key, value] : members)
    if (key == name) return value;
  throw std::runtime_error("the job holds no " + name);
}

std::string in_quotes(const std::string& text) {
  std::string made = "\"";
  for (char one : text) {
    char escaped[8];
    if (static_cast<unsigned char>(one) < 0x20) {
      std::snprintf(escaped, sizeof escaped, "\\u%04x", one);
      made += escaped;
    } else {
      if (one == '"' || one == '\\') made += '\\';
      made += one;
    }
  }
  return made + '"';
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

std::string list(const std::vector<std::string>& items) {
  std::string made;
  for (auto& item : items) made += (made.empty() ? "" : ", ") + item;
  return "[" + made + "]";
}

std::string object(const std::vector<Member>& members) {
  std::vector<std::string> items;
  for (auto& [name, value] : members) items.push_back(in_quotes(name) + ": " + value);
  std::string made = list(items);
  return "{" + made.substr(1, made.size() - 2) + "}";
}

}  // namespace edgeq
