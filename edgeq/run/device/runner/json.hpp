// Just enough JSON for jobs and answers.
#pragma once
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace edgeq {

struct Json {
  std::string text;                                   // of a string; a number, true, false or null as it is written
  std::vector<Json> items;                            // of an array
  std::vector<std::pair<std::string, Json>> members;  // of an object, in order

  static Json parse(const std::string& text);
  const Json& operator[](const std::string& name) const;  // throws when there is none
  double number() const { return std::stod(text); }
  bool truth() const { return text == "true"; }
};

// Values as JSON text.
std::string in_quotes(const std::string& text);
std::string number(double value);
std::string list(const std::vector<std::string>& items);
using Member = std::pair<std::string, std::string>;
std::string object(const std::vector<Member>& members);
inline std::string object(std::initializer_list<Member> members) { return object(std::vector<Member>(members)); }

template <class Values, class Write>
std::string list_of(const Values& values, Write write) {
  std::vector<std::string> items;
  for (auto& value : values) items.push_back(write(value));
  return list(items);
}

}  // namespace edgeq
